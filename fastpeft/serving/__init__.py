"""Thousands of adapters over one base model, any of them mixed in one batch: :class:`AdapterBank`."""

from fastpeft.serving.bank import AdapterBank
from fastpeft.serving.plan import Plan
from fastpeft.serving.residency import AdapterInUseError, BankFullError, UnknownAdapterError

__all__ = ["AdapterBank", "AdapterInUseError", "BankFullError", "Plan", "UnknownAdapterError"]
