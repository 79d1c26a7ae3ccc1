"""Compares finished runs: reads their folders, counts, warns, draws, and writes one report.

`runs` reads folders, `groups` puts the seeds together, `statistics` counts, `comparability` warns,
`published` knows other people's figures, `tables`, `figures` and `page` show it all, and `report` calls them
in turn.
"""
