"""Signals that end training: SIGTERM, SIGINT and SIGHUP."""

import os
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

from gsae_jax import processes


class Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into a name to look at between steps; a second one ends the process at once.

    If one of several processes receives a signal, all end after the same step, which JAX determines.
    """

    received = ""

    def stop(self, call: int) -> bool:
        """Whether to end before this call of the train step."""
        if not self._together:
            return bool(self.received)
        if not multihost_utils.reached_preemption_sync_point(call):
            return False
        self.received = self.received or "SIGTERM"
        return True

    def __enter__(self) -> "Signals":
        self._together = jax.distributed.is_initialized()
        self._before = processes.on_interruption(self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self.received:
            print(f"{signal.Signals(number).name} again: ended without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)  # an orderly exit would wait for what is being saved
        self.received = signal.Signals(number).name
        if self._together:
            signal.raise_signal(signal.SIGTERM)  # JAX handles this one, and informs the other processes

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
