"""Fixtures that several test modules share."""

from toygraph import toy as toy
