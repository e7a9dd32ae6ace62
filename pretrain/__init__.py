"""Training of the nets of Table 1 from scratch, as in Sect. 3.1 of arXiv 1409.1556.

It imports vggfeat, never the other way round.
"""
