from radiance.cli import main

raise SystemExit(main())
