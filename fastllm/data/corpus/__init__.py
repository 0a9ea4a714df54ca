"""A corpus: a folder of cleaned documents without duplicates, made from sources by a recipe, with a report."""
