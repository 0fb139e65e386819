"""`python -m jaxlora`."""

import sys

from jaxlora._cli import main

sys.exit(main())
