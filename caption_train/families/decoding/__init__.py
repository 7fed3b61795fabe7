"""Makes decoding steps cheaper at the same tokens: for beams, for few rows, for rows that are finished."""
