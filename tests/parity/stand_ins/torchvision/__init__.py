"""Stands in for torchvision, whose wheel does not import beside this build of torch: made-up data, the same each time.

Only what ignite's examples ask for. Put ``tests/parity/stand_ins`` on the path of the processes that run them.
"""
