// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes as people write them: `512M`, `1G`, `4096`.

const UNITS: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

/// Reads a size: a whole number, and K, M, G, T or P (powers of 1024), also as KiB or kB.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "\"{text}\" is not a size; write a whole number and K, M, G or T, such as 512M or 1G"
        )
    };
    let trimmed = text.trim();
    let digits = trimmed.len()
        - trimmed
            .trim_start_matches(|c: char| c.is_ascii_digit())
            .len();
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim().to_ascii_uppercase();
    let unit = unit
        .strip_suffix("IB")
        .or(unit.strip_suffix('B'))
        .unwrap_or(&unit);
    let shift = match unit.chars().next() {
        None => 0,
        Some(letter) if unit.len() == 1 => {
            let known = UNITS.iter().find(|(name, _)| *name == letter);
            known.map(|&(_, shift)| shift).ok_or_else(wrong)?
        }
        Some(_) => return Err(wrong()),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("\"{text}\" is more than any machine has; is the unit right?"))
}

/// Writes a size for people: `1.5 GiB`, `512 MiB`, `4 KiB`, `17 B`.
pub fn show(bytes: u64) -> String {
    let unit = UNITS.iter().rev().find(|&&(_, shift)| bytes >= 1 << shift);
    let Some(&(name, shift)) = unit else {
        return format!("{bytes} B");
    };
    // In tenths, rounded, by whole numbers so that nothing is lost at the large end.
    let tenths = (u128::from(bytes) * 10 + (1 << shift >> 1)) >> shift;
    if tenths.is_multiple_of(10) {
        format!("{} {name}iB", tenths / 10)
    } else {
        format!("{}.{} {name}iB", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1024),
            ("512M", 512 << 20),
            ("1g", 1 << 30),
            ("2GiB", 2 << 30),
            ("3 MB", 3 << 20),
            ("16B", 16),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "1.5G",
            "-1",
            "12Q",
            "1GG",
            "1 G M",
            "0x10",
            "99999999999999999999",
        ] {
            assert!(parse(text).unwrap_err().contains("is not a size"), "{text}");
        }
        assert!(
            parse("18446744073709551615K")
                .unwrap_err()
                .contains("is the unit right")
        );
    }

    #[test]
    fn sizes_are_written() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(show(bytes), text);
        }
    }
}
