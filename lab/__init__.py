"""Everything that measures: benchmarks, their load clients and reports. Nothing here is imported by a service."""
