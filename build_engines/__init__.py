"""Bundle to compiled plans: each with a passport, each through the parity gate."""
