"""The parts that a recipe is made of, one file per part; ``recipe.py`` puts them together. Nothing here needs torch."""
