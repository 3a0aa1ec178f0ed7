#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure a model's calibration: ``turbokv calibrate`` for hosts without the console script.

Usage: ``python scripts/calibrate_model.py OUTPUT.safetensors --model PATH [--text topics] ...``
"""

from __future__ import annotations

import sys

from turbokv import cli

if __name__ == "__main__":
    sys.argv.insert(1, "calibrate")
    cli.main()
