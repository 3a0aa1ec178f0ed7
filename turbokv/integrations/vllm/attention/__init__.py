# SPDX-License-Identifier: Apache-2.0
"""One attention layer: its implementation, a step's metadata, formats and shared scratch."""
