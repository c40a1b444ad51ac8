"""The Llama family: shapes, weights, rotation. It sees a cache only through `attend`; no policy and no store may
enter.
"""
