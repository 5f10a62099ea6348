"""The marker of tests that compare with the reference libraries (the extra `reference`)."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reference: needs torch, transformers, timm, peft and onnxruntime")
