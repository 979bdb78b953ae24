"""The fleet report and the studies: frozen documents, written as JSON (published schemas), as HTML and as SVG figures.

Rules: all files of one report hold the same numbers; no number stands without its n and its interval; "not measured"
is shown with its reason; a page is one file that asks the network for nothing. This file imports nothing heavy.
"""
