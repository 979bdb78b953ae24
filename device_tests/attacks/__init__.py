"""Attacks, one file each; an attack proposes candidates and the harness alone judges them."""
