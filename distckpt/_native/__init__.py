"""Optional code in C. ``copy_crc`` is built with the wheel if there is a C compiler, else by ``ci/build_native.py``."""
