"""Weft beside vLLM and llama.cpp, in one run on one machine.

The peers are no dependency: they lie in a folder outside the repository, which `python -m lab.peers --help` says how
to make.
"""
