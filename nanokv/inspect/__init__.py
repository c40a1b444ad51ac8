"""Looking at a cache: what was kept, and how far its odds are from another one's."""
