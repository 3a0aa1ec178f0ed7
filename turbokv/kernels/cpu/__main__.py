# SPDX-License-Identifier: Apache-2.0
"""``python -m turbokv.kernels.cpu``: compile the kernels in place."""

import sys

from turbokv.kernels.cpu.build import main

sys.exit(main())
