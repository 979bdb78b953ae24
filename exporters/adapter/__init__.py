"""Adapter packages: what a device needs on top of the fleet's base package, and how it puts the two together."""
