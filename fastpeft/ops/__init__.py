"""Operators, their fakes, their derivatives and the choice of backend; one file per method."""
