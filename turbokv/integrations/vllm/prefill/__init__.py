# SPDX-License-Identifier: Apache-2.0
"""Prefill: how a step's rows are cut, and who attends with them."""
