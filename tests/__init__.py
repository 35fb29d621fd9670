"""Tests of megatron_cm3leon.

A package, so that this folder comes before the package `tests` that torch-fidelity installs into site-packages.
"""
