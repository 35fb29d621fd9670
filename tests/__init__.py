"""The tests. A regular package: another `tests` package of an installed library must not be found first."""
