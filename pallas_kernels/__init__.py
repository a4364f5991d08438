"""Array-level attention and packing ops. They see arrays, never caches.

One folder is one op: `reference.py` defines what it computes in plain `jax.numpy`, `api.py` chooses
an implementation.
"""
