"""Latency of exported detectors on this machine: `bevqat benchmark`. numpy, a JIT and the backends, never torch.

plan         which folder runs on which backend
inputs       generated or recorded frames: images, points, calibration
worker       one row in its own process: builds, warms up, runs, reports its memory
environment  threads, clocks, load, versions, GPU: what figures depend on
statistics   percentiles, outliers, intervals over rounds
run          the whole benchmark, from folders to benchmark.json, benchmark.csv and benchmark.svg
changes      what differs between two runs beyond the noise
table, plot  the results for people

This file imports nothing: each row's process should hold only what it runs, because its memory is measured.
"""
