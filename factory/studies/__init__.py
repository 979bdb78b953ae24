"""Studies: questions about keys that take more than one fleet to answer, each a resumable run of named cells."""
