"""Run the command line: `python -m radiance`."""

from radiance.cli import main

raise SystemExit(main())
