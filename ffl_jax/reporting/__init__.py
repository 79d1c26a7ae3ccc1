"""Compares finished runs: reads their folders, counts, warns, draws, and writes one report.

`runs` reads folders, `groups` puts the seeds together, `statistics` counts, `comparability` warns, and
`published` knows other people's figures. `tables` (of `cells`), `results` (CSV) and `figures` (by means of
`drawing`) show it, `page` puts it together, and `report` calls them in turn.
"""
