"""Engines: programs that train networks, all of one contract (`windfall.train`)."""
