"""`python -m restuning.cli`."""

import sys

from restuning.cli.main import main

sys.exit(main())
