# SPDX-License-Identifier: Apache-2.0
"""What ``scripts/build_forks.py`` is made of: sources of the forks, and their wheels."""
