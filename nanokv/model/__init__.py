"""The Llama family: shapes, weights, rotation. Knows a cache only as `attend`; no policy and no store may enter."""
