"""Building blocks: attention over histories, recency, the RankMixer head, embedding tables."""
