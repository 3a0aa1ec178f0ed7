# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness on a compressed cache, in process or against a server."""
