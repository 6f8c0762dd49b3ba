"""What tests share: tiny models, cases, the float64 reference, the oracle, emulators; and the tests of these."""
