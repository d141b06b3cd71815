"""What `bench.first_contact` measures: a generator of tasks a part, and a table each."""
