# SPDX-License-Identifier: Apache-2.0
"""The recent window: 16-bit copies of newest tokens, their counters, and prefix hits."""
