"""What the engine chose on CPUs, each beside what it beat: `python -m lab.engine [--only NAME] [--json FILE]`.

A figure of a choice is how many times as long the rival took, so more than 1 is a gain. Chosen and rival run in turn,
on shapes of the models that peers are measured with; `nano` has 6.5 million parameters, `small` 125 million, and both
have random weights. Only ratios mean something on a machine with other work.
"""
