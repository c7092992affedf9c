//! Quiet hours: times of the week at which nothing is given away.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::str::FromStr;

/// Minutes of a day.
const DAY: u16 = 24 * 60;

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

/// `22:00-06:00`, `Mon-Fri 08:00-18:00`, `Sun 00:00-24:00`: local time; past midnight it belongs to the day that it began on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuietHours {
    /// As it was written.
    text: String,
    /// From Monday.
    days: [bool; 7],
    /// Minute of the day.
    from: u16,
    /// Likewise; before `from` where midnight lies between.
    to: u16,
}

impl QuietHours {
    /// Whether that minute of that day (0 is Monday) is within.
    pub fn holds(&self, day: usize, minute: u16) -> bool {
        let (today, yesterday) = (self.days[day % 7], self.days[(day + 6) % 7]);
        if self.from < self.to {
            today && (self.from..self.to).contains(&minute)
        } else {
            (today && minute >= self.from) || (yesterday && minute < self.to)
        }
    }
}

fn day(word: &str) -> Option<usize> {
    DAYS.iter().position(|day| day.eq_ignore_ascii_case(word))
}

fn days(words: &str) -> Option<[bool; 7]> {
    let (first, last) = words.split_once('-').unwrap_or((words, words));
    let (first, last) = (day(first)?, day(last)?);
    let mut days = [false; 7];
    for step in 0..=(last + 7 - first) % 7 {
        days[(first + step) % 7] = true;
    }
    Some(days)
}

fn minute(time: &str) -> Option<u16> {
    let (hour, minute) = time.split_once(':')?;
    let number = |text: &str| (text.len() == 2).then(|| text.parse::<u16>().ok()).flatten();
    let (hour, minute) = (number(hour)?, number(minute)?);
    (minute < 60 && hour * 60 + minute <= DAY).then_some(hour * 60 + minute)
}

impl FromStr for QuietHours {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (of_week, times) = text.trim().rsplit_once(' ').map_or((None, text.trim()), |(days, times)| (Some(days.trim()), times));
            let (from, to) = times.split_once('-')?;
            let hours = Self { text: text.to_owned(), days: of_week.map_or(Some([true; 7]), days)?, from: minute(from)?, to: minute(to)? };
            (hours.from != hours.to && hours.from < DAY).then_some(hours)
        };
        read()
            .ok_or_else(|| format!("`{text}` are no hours: write \"22:00-06:00\", \"Mon-Fri 08:00-18:00\", or \"00:00-24:00\" for all day"))
    }
}

impl Serialize for QuietHours {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for QuietHours {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// An hour too long gives the uplink away at work; one across midnight is where such code is wrong.
    #[test]
    fn hours_of_the_week() {
        let hours = |text: &str| text.parse::<QuietHours>().unwrap();
        let check =
            |text: &str, day, time: &str, want| assert_eq!(hours(text).holds(day, minute(time).unwrap()), want, "{text} at {day} {time}");
        for day in 0..7 {
            check("08:00-18:00", day, "07:59", false);
            check("08:00-18:00", day, "08:00", true);
            check("08:00-18:00", day, "17:59", true);
            check("08:00-18:00", day, "18:00", false);
            check("22:00-06:00", day, "23:59", true);
            check("22:00-06:00", day, "05:59", true);
            check("22:00-06:00", day, "06:00", false);
            check("00:00-24:00", day, "00:00", true);
            check("00:00-24:00", day, "23:59", true);
        }
        check("Mon-Fri 08:00-18:00", 4, "12:00", true);
        check("Mon-Fri 08:00-18:00", 5, "12:00", false);
        // Begun on Friday night, it lasts into Saturday; begun on Sunday night, into Monday.
        check("fri 22:00-06:00", 5, "03:00", true);
        check("Fri 22:00-06:00", 4, "03:00", false);
        check("Sun 22:00-06:00", 0, "03:00", true);
        check("Sat-Mon 10:00-11:00", 6, "10:30", true);
        check("Sat-Mon 10:00-11:00", 2, "10:30", false);
        let round = serde_json::to_string(&hours("Fri 22:00-06:00")).unwrap();
        assert_eq!(serde_json::from_str::<QuietHours>(&round).unwrap(), hours("Fri 22:00-06:00"));
        for bad in ["", "8:00-18:00", "08:00", "25:00-26:00", "08:60-09:00", "08:00-08:00", "24:00-06:00", "Mo 08:00-09:00", "Mon-Fri"] {
            let said = bad.parse::<QuietHours>().unwrap_err();
            assert!(said.contains("are no hours: write"), "{said}");
        }
    }
}
