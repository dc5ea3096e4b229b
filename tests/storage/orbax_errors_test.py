"""Errors of Orbax that are raised are not printed a second time."""

import logging

import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.storage import orbax_errors

LATE = "Task exception was never retrieved\nfuture: <Task finished exception=Exception('b')>"


def test_errors_of_further_arrays_are_not_logged(caplog):
    with pytest.raises(UserError), orbax_errors.translate_damage("item"):
        raise Exception("a")
    logger = logging.getLogger("asyncio")
    logger.error(LATE)
    logger.error("another error")
    assert [record.getMessage() for record in caplog.records] == ["another error"]
