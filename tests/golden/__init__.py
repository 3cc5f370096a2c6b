"""Files of each schema that distckpt has written, which load for ever, and what they hold.

``schema_N.pt`` was written by one writer, ``schema_N_shared.pt`` in shares by two, with replicated storages first and
others after. Those of older schemas cannot be made any more: they are from the last commit that wrote them (schema 1:
da4b6eb). Those of the present one are made anew by ``python -m tests.golden``, after
:data:`distckpt.ptformat.manifest.SCHEMA` was raised; a file that was released never changes.
"""
