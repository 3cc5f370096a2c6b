"""Optional code in C, built with the wheel if there is a C compiler, else by ``ci/build_native.py``."""
