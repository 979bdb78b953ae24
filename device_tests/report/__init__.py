"""The fleet report: one frozen document, written as report.json (published schema) and as report.html.

Rules: both files hold the same numbers; no number stands without its n and its interval; "not measured" is shown
with its reason; the page is one file that asks the network for nothing. This file imports nothing heavy.
"""
