"""Conventions that every stage shares: errors, files, geometry, preprocessing, box decoding.

Nothing here imports torch, so that `qat.engine` and `qat.runtime` run where torch is not installed.
"""
