# SPDX-License-Identifier: Apache-2.0
"""Offsets of centred keys: from a file, or measured on the model that vLLM has loaded."""
