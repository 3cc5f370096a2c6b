"""Code in C, for what Python and torch have no call for. It may be absent: nothing outside may need it.

``copy_crc`` is built with the wheel where there is a C compiler, and in a checkout by ``ci/build_native.py``.
"""
