# SPDX-License-Identifier: Apache-2.0
"""``python -m turbokv.kernels.cuda``: compile the kernels in place."""

import sys

from turbokv.kernels.cuda.build import main

sys.exit(main())
