// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an alias says: the number of the image that it has its bytes from.

/// Bytes of an alias's payload: three times the image's number, since no checksum of the page that
/// it stands for guards it, and a wrong number would be another page's loss.
pub(crate) const ALIAS_BYTES: usize = 12;

/// The payload that names an image.
pub(crate) fn alias_payload(image: u32) -> [u8; ALIAS_BYTES] {
    let mut payload = [0; ALIAS_BYTES];
    for copy in payload.as_chunks_mut::<4>().0 {
        *copy = image.to_le_bytes();
    }
    payload
}

/// The number of the image that an alias's payload names: of each bit what two of three copies say.
pub(crate) fn image_in(payload: &[u8]) -> Option<u32> {
    let ([a, b, c], []) = payload.as_chunks::<4>() else {
        return None;
    };
    let [a, b, c] = [a, b, c].map(|copy| u32::from_le_bytes(*copy));
    Some(a & b | b & c | a & c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_survives_any_flipped_bit() {
        let payload = alias_payload(0x1234_5678);
        for bit in 0..ALIAS_BYTES * 8 {
            let mut flipped = payload;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(image_in(&flipped), Some(0x1234_5678));
        }
        assert_eq!(image_in(&payload[..8]), None);
    }
}
