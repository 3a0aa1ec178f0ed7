# SPDX-License-Identifier: Apache-2.0
"""Engine-facing classes, one folder per engine; only that folder imports the engine."""
