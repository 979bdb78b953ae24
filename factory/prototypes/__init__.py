"""Prototype conformity loss: trainable class centroids at several depths, and answers by the nearest of them.

Mustafa et al., "Adversarial Defense by Restricting the Hidden Space of Deep Neural Networks" (ICCV 2019).
"""
